"""Pictures of folders and what was answered about them: captions, search, exports."""
