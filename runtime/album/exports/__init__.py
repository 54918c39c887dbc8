"""What an album holds, in the files that other programs read. Pictures themselves are never written to."""
