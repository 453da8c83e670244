"""Votes of people as a reward: the file of votes, groups that wait for one, and the reward itself."""
