"""The Bayesian influence function: SGLD chains around trained weights, and what is read off them."""
