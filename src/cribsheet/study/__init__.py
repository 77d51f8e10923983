"""Sheets that learn: keys and values refined until the model over them writes what it writes over the documents."""
