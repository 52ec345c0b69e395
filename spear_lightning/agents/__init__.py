"""What decides the shape of prompts and reads responses."""
