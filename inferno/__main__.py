"""`python -m inferno`, where the `inferno` command is not installed."""

from inferno.cli.main import main

if __name__ == "__main__":
    main()
