"""What goes in: documents, and the files, folders and strings that they are read from."""
