"""The mixture-of-experts operator and what both other rooms share."""
