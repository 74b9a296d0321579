"""What an optimizer makes of a gradient, now and over the rest of the schedule."""
