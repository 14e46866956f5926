"""What a run will take: bytes, seconds, memory."""
