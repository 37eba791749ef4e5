"""What each command does, a file a group: building, talking to a model, looking at things."""
