"""Can a corruption matter for any task? Answered from the images alone, without labels."""
