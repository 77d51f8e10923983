"""What finds passages, and where they stand beside a sheet."""
