#include "core/synthesize/rules_words.h"

const char *const ks_rules_synonyms[][KS_RULES_GROUP_SIZE] = {
    {"begin", "start"},
    {"big", "large"},
    {"quick", "rapid", "speedy"},
    {"quickly", "rapidly"},
    {"buy", "purchase"},
    {"help me", "assist me"},
    {"maybe", "perhaps"},
    {"often", "frequently"},
    {"usually", "normally", "typically"},
    {"important", "essential", "crucial"},
    {"difficult", "hard", "tough"},
    {"easy", "simple"},
    {"happy", "glad"},
    {"scared", "afraid", "frightened"},
    {"tired", "exhausted"},
    {"ill", "sick", "unwell"},
    {"doctor", "physician"},
    {"medicine", "medication"},
    {"pain", "ache"},
    {"belly", "stomach"},
    {"kid", "child"},
    {"kids", "children"},
    {"mother", "mom"},
    {"father", "dad"},
    {"error", "mistake"},
    {"errors", "mistakes"},
    {"method", "approach"},
    {"methods", "approaches"},
    {"advice", "guidance"},
    {"tips", "suggestions", "pointers"},
    {"ideas", "thoughts"},
    {"answer", "reply"},
    {"choose", "pick", "select"},
    {"need to", "have to"},
    {"want to", "would like to"},
    {"improve", "enhance"},
    {"reduce", "lower", "decrease"},
    {"fix", "repair"},
    {"talk", "speak"},
    {"think about", "consider"},
    {"find out", "discover"},
    {"look for", "search for"},
    {"get rid of", "remove"},
    {"right now", "at the moment", "currently"},
    {"nowadays", "these days"},
    {"a lot of", "lots of", "plenty of"},
    {"although", "though"},
    {"for example", "for instance"},
    {"nearly", "almost"},
    {"entire", "whole"},
    {"movie", "film"},
    {"movies", "films"},
    {"photo", "picture"},
    {"photos", "pictures"},
    {"car", "vehicle"},
    {"give me", "provide me with"},
    {"everyone", "everybody"},
    {"someone", "somebody"},
    {"anyone", "anybody"},
    {"in order to", "so as to"},
    {"until", "till"},
    {"types of", "kinds of", "sorts of"},
    {"famous", "well-known"},
    {"strange", "odd", "weird"},
    {"smart", "clever"},
    {"beautiful", "lovely"},
    {"terrible", "awful"},
    {"benefits", "advantages"},
    {"drawbacks", "disadvantages"},
    {"permitted to", "allowed to"},
    {"i am", "i'm"},
    {"i have been", "i've been"},
    {"i would", "i'd"},
    {"do not", "don't"},
    {"does not", "doesn't"},
    {"did not", "didn't"},
    {"cannot", "can't"},
    {"is not", "isn't"},
    {"are not", "aren't"},
    {"will not", "won't"},
    {"you are", "you're"},
    {"let us", "let's"},
    {NULL},
};

/* clang-format off */
#define HOW_TO {{"how do i ", '?'}, {"how can i ", '?'}, {"how should i ", '?'}, {"could you tell me how to ", '?'},                 \
                {"can you show me how to ", '?'}, {"please tell me how to ", '.'}, {"i would like to know how to ", '.'},            \
                {"what is the best way to ", '?'}, {NULL, 0}}
#define REQUESTS {{"can you ", '?'}, {"could you ", '?'}, {"would you ", '?'}, {"could you please ", '?'}, {"would you please ", '?'}, \
                  {"please ", '.'}, {"i would like you to ", '.'}, {"i need you to ", '.'}, {NULL, 0}}

const ks_rules_opening ks_rules_requests[KS_RULES_OPENINGS] = REQUESTS;

const ks_rules_opening ks_rules_openings[][KS_RULES_OPENINGS] = {
    HOW_TO,
    REQUESTS,
    {{"how do you ", '?'}, {"how does one ", '?'}, {"how can one ", '?'}, {"how do people ", '?'}, {NULL, 0}},
    {{"what should i do ", '?'}, {"what can i do ", '?'}, {"what would you do ", '?'}, {"what do you suggest i do ", '?'},
     {"what am i to do ", '?'}, {NULL, 0}},
    {{"do you know ", '?'}, {"can you tell me ", '?'}, {"could you tell me ", '?'}, {"please tell me ", '.'}, {"i wonder ", '.'},
     {"i would like to know ", '.'}, {"would you happen to know ", '?'}, {NULL, 0}},
    {{"is it possible to ", '?'}, {"is there a way to ", '?'}, {"can one ", '?'}, {NULL, 0}},
    {{"where can i find ", '?'}, {"where do i find ", '?'}, {"where could i get ", '?'}, {"do you know where i can find ", '?'},
     {"please tell me where i can find ", '.'}, {NULL, 0}},
    {{"what are some ", '?'}, {"can you name some ", '?'}, {"could you list some ", '?'}, {"please name some ", '.'},
     {"name some ", '.'}, {"list some ", '.'}, {NULL, 0}},
    {{"why do i ", '?'}, {"what is the reason that i ", '?'}, {"how come i ", '?'}, {NULL, 0}},
    {{"do you have any ", '?'}, {"have you got any ", '?'}, {"could you give me any ", '?'}, {NULL, 0}},
    {{NULL, 0}},
};
/* clang-format on */

const char *const ks_rules_imperatives[] = {
    "give",      "explain",   "describe",   "write",      "list",      "name",       "tell",      "create",
    "generate",  "suggest",   "find",       "make",       "show",      "provide",    "identify",  "compare",
    "help",      "translate", "rewrite",    "edit",       "calculate", "classify",   "design",    "discuss",
    "summarize", "outline",   "propose",    "recommend",  "compose",   "construct",  "determine", "convert",
    "predict",   "analyze",   "evaluate",   "brainstorm", "read",      "select",     "arrange",   "add",
    "choose",    "complete",  "fill",       "sort",       "rank",      "imagine",    "use",       "take",
    "pick",      "think",     "consider",   "delete",     "remove",    "replace",    "change",    "turn",
    "transform", "simplify",  "paraphrase", "check",      "count",     "estimate",   "solve",     "draw",
    "plan",      "organize",  "categorize", "extract",    "highlight", "illustrate", "develop",   "invent",
    "respond",   "answer",    "state",      "cite",       "match",     "correct",    "fix",       "improve",
    "prove",     "output",    "remind",     "teach",      NULL};

const char *const ks_rules_starters[] = {
    "what",  "what's", "how",  "why",   "when",  "where",  "who",  "which",   "can",   "could",
    "would", "should", "do",   "does",  "did",   "is",     "are",  "was",     "were",  "will",
    "may",   "the",    "a",    "an",    "my",    "our",    "your", "his",     "her",   "their",
    "its",   "this",   "that", "these", "those", "it",     "he",   "she",     "we",    "they",
    "you",   "there",  "have", "has",   "had",   "please", "if",   "because", "after", "before",
    "while", "unless", "some", "in",    "on",    "at",     "for",  "to",      NULL};

const char *const ks_rules_clauses[] = {"if", "because", "after", "before", "while", "unless", NULL};

const char *const ks_rules_whether_after[] = {
    "know", "see", "me",  "wonder", "wondering", "check", "ask", "sure", "decide", "determine", "out",
    "and",  "or",  "but", "what",   "even",      "only",  "as",  "just", "long",   "soon",      NULL};

const char *const ks_rules_not_subjects[] = {"it",   "wrong", "happening", "going",  "this",  "that", "there",
                                             "up",   "new",   "good",      "better", "worse", "to",   "in",
                                             "like", "more",  "left",      "next",   "meant", "on",   NULL};

const char *const ks_rules_abbreviations[] = {"dr",  "mr",  "mrs", "ms",  "prof", "st",  "vs",  "no",
                                              "e.g", "i.e", "etc", "a.m", "p.m",  "u.s", "fig", NULL};

const char *const ks_rules_greetings[] = {"Hi, ", "Hello, ", "Hey, ", NULL};
const char *const ks_rules_intros[] = {
    "Quick question: ", "One question: ", "A question for you: ", "I was wondering: ", NULL};
const char *const ks_rules_closings[] = {" Thanks.", " Thank you.", " Thanks in advance.", NULL};
const char *const ks_rules_appeals[] = {" Please let me know.", " Any ideas?", " I would appreciate it.",
                                        NULL};
