"""What somebody meets in the first minute, with models and corpora of the size that people begin with."""
