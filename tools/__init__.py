"""Commands that one runs by hand. Nothing imports them."""
