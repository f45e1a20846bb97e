"""Pictures of runs and of searches: numbers in, PNG and HTML files out."""
