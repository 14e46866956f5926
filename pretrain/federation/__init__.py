"""What is done to a federation from outside its loops."""
