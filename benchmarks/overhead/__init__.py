"""What a recording costs beside plain training, and beside other ways to each row's gradients."""
