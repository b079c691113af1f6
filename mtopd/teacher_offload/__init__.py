"""Teachers on storage: the store's format, streaming its layers through the ranks, one resident
head.
"""
