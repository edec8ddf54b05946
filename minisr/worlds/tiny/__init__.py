"""A tiny world of requests in plain English, with an oracle that can check any answer.

words.py    the language: words, requests, answers
oracle.py   reads any request and any text: 0 to 5 points
writers.py  the people of the world: how they answer, review and grade, with their bad habits
corpus.py   what they left behind: the pretraining text, the seed data, the evaluation prompts
"""
