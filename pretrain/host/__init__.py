"""What every process of ours needs of its machine."""
