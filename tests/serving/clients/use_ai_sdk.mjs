// The AI SDK (npm: ai): text, a stream, an object of a schema, and calls of tools.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "smolforge", baseURL: url, apiKey: "none", supportsStructuredOutputs: true });
const model = provider(name);
const prompt = "Tell me about an animal of the forest.";
const Animal = z.object({ kind: z.enum(["fox", "bear", "owl"]), legs: z.number().int().min(0).max(99), tame: z.boolean() });

const asked = { model, prompt, maxOutputTokens: 8, seed: 1, maxRetries: 0 };
const whole = (await generateText(asked)).text;
let text = "";
for await (const part of streamText(asked).textStream) text += part;
assert.ok(whole);
assert.equal(text, whole);
const { output } = await generateText({ model, prompt, maxRetries: 0, output: Output.object({ schema: Animal }) });
assert.ok(Animal.parse(output));
const find = tool({ description: "find it", inputSchema: z.object({ place: z.enum(["cave", "wood"]) }) });
const called = await generateText({ model, prompt, maxRetries: 0, tools: { find }, toolChoice: "required" });
assert.ok(called.toolCalls.length > 0);
for (const call of called.toolCalls) assert.ok(["cave", "wood"].includes(call.input.place));
console.log("ok");
