"""What every part uses: errors, validation, reading and atomic writing of files."""
