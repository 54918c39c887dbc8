"""A picture becomes pixels, and pixels become feature rows. Never sees text."""
