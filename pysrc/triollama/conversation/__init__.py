"""Conversations: committed history, the plan of a turn, the turn itself, and who has which."""
