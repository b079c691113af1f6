"""What turns the student's hidden states into a loss."""
