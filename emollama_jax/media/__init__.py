"""What is seen and heard in a clip, made ready for the encoders."""
