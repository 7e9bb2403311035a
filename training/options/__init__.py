"""What a user can choose, and whether it fits together."""
