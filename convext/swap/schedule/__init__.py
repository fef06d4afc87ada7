"""What runs together, and in which memory format."""
