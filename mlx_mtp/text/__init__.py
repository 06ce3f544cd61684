"""Between text and tokens: tokenizer, chat template, answers, and the tool calls in them."""
