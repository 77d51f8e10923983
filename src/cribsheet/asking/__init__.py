"""From a question to an answer: modes, streams, evidence."""
