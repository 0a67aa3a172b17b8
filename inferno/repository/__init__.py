"""What a model package says of itself, and where packages are found."""
