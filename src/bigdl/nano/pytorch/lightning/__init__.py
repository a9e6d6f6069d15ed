"""The plan, exact resume and guests inside Lightning's loop."""
