"""How each token set is made: one folder with a prepare.py a set, and what they share."""
