"""What a compiled step says, and pages of it."""
