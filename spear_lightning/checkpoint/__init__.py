"""What a checkpoint is, and what each rank puts into it."""
