"""From measurements and a budget to a plan."""
