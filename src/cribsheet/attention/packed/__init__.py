"""A prefix whose numbers stay in four bits on the device."""
