"""Studies with people: which system's pictures do they prefer, and which automatic reward agrees with them?"""
