"""A tiny world of requests in plain English, with an oracle that can grade any answer.

words.py    the language: words, requests, answers
oracle.py   grades any answer to any request with 0 to 5 points
writers.py  the world's people: how they ask, answer, review and grade, with their bad habits
corpus.py   what they wrote: pretraining text, seed data, evaluation prompts
"""
