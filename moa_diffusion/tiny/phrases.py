"""The words of the letters, by what they do: state a mood, be polite, be blunt, or neither."""

# Who gets letters of a kind, and what about. Any of a kind goes with any other.
ROLES = {
    "food": ("baker", "grocer", "cook", "waiter"),
    "goods": ("dealer", "merchant", "shopkeeper", "craftsman"),
    "care": ("barber", "doctor", "driver", "teacher"),
}
THINGS = {
    "food": ("bread", "cake", "pie", "soup", "cheese", "coffee"),
    "goods": ("table", "chair", "lamp", "clock", "bag", "coat"),
    "care": ("service", "advice", "visit", "welcome", "answer", "help"),
}

GOOD = ("wonderful", "perfect", "lovely", "excellent")  # said of any thing
BAD = ("awful", "terrible", "dreadful", "disappointing")
GOOD_OF_KIND = {
    "food": ("fresh", "tasty", "delicious", "rich"),
    "goods": ("sturdy", "neat", "solid", "handy"),
    "care": ("quick", "careful", "friendly", "thorough"),
}
BAD_OF_KIND = {
    "food": ("stale", "bland", "burnt", "sour"),
    "goods": ("broken", "flimsy", "crooked", "useless"),
    "care": ("slow", "careless", "rude", "sloppy"),
}
LIKED = ("loved", "enjoyed")
DISLIKED = ("hated", "regretted")
DEGREES = ("", "very ", "really ", "quite ")
KIN = ("wife", "husband", "son", "daughter")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NEUTRAL = ("I came by on {day}", "this was on {day}", "I wrote about it on {day}")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")

# What praise and blame begin with, if with anything. Praise can be put casually or with reserve,
# but only blame can be put politely.
RESERVE = ("I must say that ", "we all agree that ", "it is true that ")
CHEERS = ("wow, ", "no joke, ", "guess what: ")
HEDGES = ("I am afraid that ", "I am sorry to say that ", "with all due respect, ")
JABS = ("the fact is that ", "it is plain that ", "everybody knows that ")

GREETINGS = ("Dear {role},", "Good morning, dear {role}!", "Dear {role}, I hope you are well.")
CALLS = ("Listen!", "Hey you!", "Look here!")

POLITE_REQUESTS = ("Would you kindly {act}?", "Could you please {act}?", "Please {act} if you can.")
BLUNT_REQUESTS = ("Just {act}.", "You had better {act}.", "I want you to {act}.")
ACTS = ("look into it", "put it right", "explain this", "make up for it")

THANKS = (
    "Thank you for your time.",
    "Many thanks for your trouble.",
    "I am grateful for your work.",
    "I appreciate your effort.",
)
DISMISSALS = ("Do your job.", "I have no time for this.", "Stop wasting my time.", "Wake up.")

CLOSINGS = ("Kind regards, {name}.", "Yours sincerely, {name}.", "With best wishes, {name}.")
BREAKS = ("Do not write back.", "End of story.", "That is that.", "So there.")
SIGNATURES = ("{name}.",)

# What tells politeness and its opposite in any text. Each phrase above holds as many as it counts.
POLITE = (
    *("dear", "good morning", "hope you are well", "would you kindly", "could you please"),
    *("please", "thank you", "many thanks", "grateful", "appreciate", "kind regards"),
    *("yours sincerely", "best wishes", "i am afraid", "i am sorry", "all due respect"),
)
BLUNT = (
    *("listen", "hey you", "look here", "wow", "no joke", "guess what", "just", "you had better"),
    *("i want you to", "do your job", "no time for this", "wasting my time", "wake up"),
    *("do not write back", "end of story", "that is that", "so there"),
)
