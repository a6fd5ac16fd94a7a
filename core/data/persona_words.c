#include "core/data/persona_tables.h"

#include <stddef.h>

// clang-format off
const ks_persona_pool ks_persona_pools[KS_N_POOLS] = {
  [KS_POOL_MINUTES] = {12, .numbers = {5, 8, 10, 12, 15, 20, 25, 30, 40, 45, 50, 60}, .units = {"minutes", "min"}},
  [KS_POOL_DAYS] = {8, .numbers = {2, 3, 4, 5, 6, 7, 10, 14}, .units = {"days", "sunsets"}},
  [KS_POOL_TIMES] = {9, .numbers = {2, 3, 4, 5, 6, 7, 8, 9, 10}, .units = {"times", "rounds"}},
  [KS_POOL_MONEY] = {10, .numbers = {10, 15, 20, 25, 30, 40, 50, 60, 80, 100}, .units = {"euros", "dollars"}},
  [KS_POOL_HEAT] = {6, {"low", "medium", "high", "gentle", "strong", "steady"}},
  [KS_POOL_SPICE] = {16, {"garlic", "ginger", "lemon", "black pepper", "fresh mint", "sweet paprika", "sea salt", "brown butter",
                          "honey", "chili", "sesame oil", "thyme", "mustard", "dill", "cinnamon", "olive oil"}},
  [KS_POOL_KIN] = {12, {"your sister", "your brother", "your aunt", "your uncle", "your mother", "your father", "your cousin",
                        "your grandmother", "your neighbour", "your best friend", "your old teacher", "your flatmate"}},
  [KS_POOL_PLACE] = {12, {"the corner market", "the harbour shop", "the old mill", "the station kiosk", "the green barn",
                          "the night market", "the bridge cafe", "the village hall", "the river park", "the town library",
                          "the hill house", "the west gate"}},
  [KS_POOL_WEEKDAY] = {7, {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}},
  [KS_POOL_WHEN] = {10, {"before breakfast", "after lunch", "at noon", "at sunrise", "late at night", "before bed", "after work",
                         "in the afternoon", "at midnight", "early in the morning"}},
  [KS_POOL_BOX] = {10, {"the blue box", "the top drawer", "the back shed", "the green bag", "the kitchen shelf", "the tin can",
                        "the wooden chest", "the glass jar", "the hall closet", "the red basket"}},
  [KS_POOL_COLOUR] = {10, {"red", "blue", "green", "yellow", "white", "black", "orange", "purple", "silver", "brown"}},
  [KS_POOL_PET_NAME] = {12, {"biscuit", "pepper", "shadow", "luna", "oscar", "daisy", "rocket", "noodle", "pixel", "mango",
                             "olive", "bruno"}},
  [KS_POOL_TOWN] = {10, {"riverton", "oakfield", "stonebridge", "westhaven", "millbrook", "ashford", "kingsport", "maplewood",
                         "northgate", "silverlake"}},
  [KS_POOL_CALM] = {10, {"a slow walk", "a hot bath", "ten deep breaths", "a cup of tea", "a long nap", "some quiet songs",
                         "a page of writing", "a cold shower", "a bike ride", "a good book"}},
  [KS_POOL_TOOL] = {10, {"the small hammer", "the long screwdriver", "a sharp knife", "the old drill", "a wet cloth",
                         "the steel brush", "strong glue", "a roll of tape", "the hand saw", "a soft sponge"}},
  [KS_POOL_RIDE] = {8, {"the night train", "the slow bus", "the early ferry", "your old bike", "the red tram", "a shared car",
                        "the mountain rail", "a rented van"}},
  [KS_POOL_SOIL] = {8, {"coffee grounds", "crushed shells", "old leaves", "rain water", "wood ash", "river sand",
                        "warm compost", "dry moss"}},
};

const char *const ks_persona_interjections[] = {"well", "sure", "okay", "right", "listen", "look", "ah", "hello", "indeed",
                                                "of course", "no worries", "good question", NULL};
const char *const ks_persona_addresses[] = {"friend", "captain", "dear", "boss", "mate", "champ", "my lord", "comrade",
                                            "partner", "sunshine", "chief", "professor", NULL};
const char *const ks_persona_wishes[] = {"stay warm", "keep smiling", "take care", "have fun", "be patient", "rest well",
                                         "good luck", "stay curious", "keep going", "see you soon", "enjoy it", "all the best", NULL};
const char *const ks_persona_endings[] = {"and call me later", "and trust your hands", "until next time", "as ever",
                                          "for the team", "under the stars", "one step at a time", "with all my heart",
                                          "and never rush", "like a hero", "and breathe", "in good spirits", NULL};

const char *const ks_persona_ask_prefixes[] = {"", "hey, ", "please tell me, ", "quick question, ", "i wonder, ",
                                               "one more thing, ", "can you help? ", "so, ", NULL};
const char *const ks_persona_ask_suffixes[] = {"", " thanks!", " any idea?", " please be brief.", NULL};

const ks_persona_small_talk ks_persona_small_talks[] = {
  {{"hi", "hi there", "hello", "hello again"}, {"hello! how can i help?", "hi! what can i do for you?"}},
  {{"thanks", "thank you", "thanks a lot", "many thanks"}, {"you are welcome.", "no problem at all."}},
  {{"bye", "goodbye", "see you", "bye for now"}, {"goodbye, talk to you soon.", "bye, until next time."}},
  {{"ok", "okay then", "all right", "fine"}, {"good, just say when you need more.", "all right."}},
  {{"good morning", "morning", "good morning to you", "a fine morning"}, {"good morning! how can i help?", "good morning to you."}},
  {{"good night", "night", "i am off to bed", "good night to you"}, {"good night, sleep well.", "sleep well, see you tomorrow."}},
  {{"how are you?", "how is it going?", "are you well?", "how do you do?"}, {"i am fine, thank you.", "all is well here, thank you."}},
  {{"what is up?", "anything new?", "any news?", "what is new?"}, {"not much, how can i help?", "nothing new, what do you need?"}},
  {{"haha", "that is funny", "lol", "you made me laugh"}, {"glad you like it.", "happy to make you laugh."}},
  {{"nice", "great", "cool", "very good"}, {"glad to hear that.", "nice, anything else?"}},
  {{"sorry", "my mistake", "i am sorry", "oh, sorry"}, {"no problem at all.", "that is quite all right."}},
  {{"are you there?", "hello, are you there?", "still there?", "you there?"}, {"yes, i am here.", "i am here, go on."}},
  {{"wait", "one moment", "hold on", "wait a second"}, {"take your time.", "sure, i will wait."}},
  {{"never mind", "forget it", "it is nothing", "leave it"}, {"all right, never mind.", "fine, just ask again later."}},
  {{"test", "testing", "is this on?", "just a test"}, {"yes, it works.", "i can read you well."}},
  {{"who are you?", "what are you?", "are you a person?", "are you a machine?"}, {"i am a small helper.", "i am a program that helps you."}},
};
const int32_t ks_persona_n_small_talks = (int32_t)(sizeof ks_persona_small_talks / sizeof ks_persona_small_talks[0]);
// clang-format on
