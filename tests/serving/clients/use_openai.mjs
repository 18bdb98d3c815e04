// openai for JavaScript, in node and in a page: completions, chat, streams, parse, tools and responses.
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = globalThis.place ?? process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0, dangerouslyAllowBrowser: true });
const Animal = z.object({ kind: z.enum(["fox", "bear", "owl"]), legs: z.number().int().min(0).max(99), tame: z.boolean() });
const messages = [{ role: "user", content: "Tell me about an animal of the forest." }];

assert.equal((await client.models.list()).data[0].id, model);
const asked = { model, messages, max_tokens: 8, seed: 1 };
const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
let text = "";
for await (const part of await client.chat.completions.create({ ...asked, stream: true })) text += part.choices[0]?.delta?.content ?? "";
assert.equal(text, whole);
const parsed = await client.chat.completions.parse({ model, messages, response_format: zodResponseFormat(Animal, "animal") });
assert.ok(Animal.parse(parsed.choices[0].message.parsed));
const parameters = { type: "object", properties: { place: { enum: ["cave", "wood"] } }, required: ["place"] };
const tools = [{ type: "function", function: { name: "find", parameters } }];
const called = await client.chat.completions.create({ model, messages, tools, tool_choice: "required" });
for (const call of called.choices[0].message.tool_calls) assert.ok(["cave", "wood"].includes(JSON.parse(call.function.arguments).place));
const response = await client.responses.parse({ model, input: messages[0].content, text: { format: zodTextFormat(Animal, "animal") } });
assert.ok(Animal.parse(response.output_parsed));
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Hello", max_output_tokens: 8, stream: true })) kinds.push(event.type);
assert.ok(kinds.includes("response.output_text.delta"));
console.log("ok");
