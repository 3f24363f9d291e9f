"""Scores of replies: what reinforcement learning maximises."""
