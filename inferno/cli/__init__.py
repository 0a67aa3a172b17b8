"""The `inferno` command: one file per family of subcommands."""
