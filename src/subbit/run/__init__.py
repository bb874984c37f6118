"""Long work: progress, a log line per linear, commits and resume, memory."""
