"""One script, one training job; what the scripts share stands beside them: README.md maps the files."""
