"""From a validated request to an accepted task (step "submit")."""
