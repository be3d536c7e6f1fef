"""Who owns which token and which head, and how it travels between ranks."""
