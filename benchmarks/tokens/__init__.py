"""Does suppressing the tokens that promote unwanted text make a language model stop writing it?"""
