"""What codecs do to speech, measured side by side on the same clips."""
