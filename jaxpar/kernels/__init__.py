"""What one device computes: attention and products. Nothing here communicates."""
