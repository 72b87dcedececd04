"""What every part may use: errors, exit codes, files, names and lookups. Imports nothing of the package."""
