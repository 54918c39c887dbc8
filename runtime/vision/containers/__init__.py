"""An image file's bytes -> what its pixels need of it, and what decoding will take. A room of files, one a format."""
